"""What minillm made before it was taken apart and put together again: the digests of what each part makes.

golden_bits.py makes it, in a process of its own, in which no signature is checked. What is text, ids or files
has the same digest on every machine. Floating-point numbers are held to four digits here; to the bit they are
compared by running that file in two trees on one machine.
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from golden_bits import attention, hashes, numbers, sessions, training


@pytest.fixture(scope="module")
def made():
    """From a part's name to the digests of what it makes."""
    command = [sys.executable, Path(__file__).with_name("golden_bits.py")]
    found = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)
    return lambda part: {
        name.removeprefix(f"{part}: "): each for name, each in found.items() if name.startswith(f"{part}: ")
    }


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def near(values):
    return pytest.approx(values, rel=1e-4)


def test_the_recipes_ask_for_what_they_asked_for(made):
    assert made("recipes") == {
        "run": "d528bf9361cd1cd9f5feefa948141cab3e622f72c2f6128044465f02c571c107",
        "clean": "f3cc37122a7b3ad8a0fab23107b79202b3242b77eda8bbe3f4837c7dbcf0cca7",
        "steps": "a429a6fd69e54ae4f225d10fd7502ddf061f26f2ca41c158e5aeb97b086871d5",
        "models": "9bafd1e86cc122b7682afc65743797b23d9c28362a3f4048803dafad5f94c30a",
    }


def test_the_corpus_tells_the_same_stories_and_knows_the_same_about_them(made):
    assert made("corpus") == {
        "benchmark.jsonl": "257199356c0fe2557f1f292cf70aedee7e85f8876735c95e0b9020f6d536fcb4",
        "default.jsonl": "bd8f234311cfc2a11a664c7c26338b61a3b3425dac7d89a5d96be381a910e84d",
        "everything.jsonl": "1c68fd54977793641f8046a6017b07f2c23f6058ebe5a17966cfbfe8edc048c8",
        "heldout.jsonl": "dcc12808b0f89aeed8950317098d011a3e004554b589138f1b6f09b42368efe8",
        "spoiled.jsonl": "953773916d394a481a3ce6b9f8b83bef40fff2dd1a5259e06ea854ae53c493fa",
    }


def test_the_exams_ask_the_same_and_a_story_is_read_back_the_same(made):
    assert made("exams") == {
        "exams": "bd3916dfed75a8d16208a40fc0df19165477c95e5d2ea6d59f567d0dc614012f",
        "asked": "40465ad37b33706694e63f6bd74a49ea311ed3ccaf25b9484ab4218bba6eae38",
        "of every part": "a17f3e75346c7989857263007c52b2da452c0fab391d21a9778621ae01df59e0",
        "read back": "b00edb5f69973260b109cc44a623dbbd8b0fb06616b84e75189c1afae07f2e5f",
    }


def test_a_page_is_written_and_its_main_text_found_as_before(made):
    assert made("pages") == {
        "written": "d4e46a301f98a5fcaea72cc2544fd8e6827735bd317dbee1cd27543659de4c1c",
        "truth": "ae12e8de645af5699c1009f306124f89eb769074f3b631063cb57d1ac60181b6",
        "read": "82e806cfe9fb1db69dceb70c354031c6703640b5c7f7ba0d560f12af989bae74",
        "main text": "9a2c6157be2102de9e46c713c446068a453022952273d11bac43f282c1e625ec",
    }


def test_cleaning_keeps_and_drops_the_same_documents_for_the_same_reasons(made):
    assert made("cleaned") == {
        "web, kept": "697786b44eca82c93923a1a1112aea55063c473a70905a8c7f6203781a8639c2",
        "web, dropped": "855896198225c92365057d27f26edb92cc90d04e9733262178a287b6df2c446d",
        "web, accounts": "280bb448bc01ee69453cf0f41b0f822695a5fcd4669a648f93e76b37fcba273e",
        "own, kept": "cba251ee0cfcf7b7f09dcacc72f3e512e721aa6cd8901ce08b3bfff0554afe50",
        "own, dropped": "75184765c09d4e2ad315bdc36c2e1aa1a4e263a4de744eb93ebc9f06d4b1daf8",
        "own, accounts": "bdf2b3ae84885a7d94cb913aac4e8bdb80dde5a927aa1103c8167c32d11e0f4e",
    }


def test_a_tokenizer_learns_the_same_tokens_and_cuts_text_the_same(made):
    assert made("tokenizers") == {
        "bpe, file": "98d392b7cc1354aa38403833accd1e1c3c25254ebe6be179ce0c21be9d2950ee",
        "sentencepiece, file": "1033e138701c90203dffe2d006a7bb5321f11a4fd0e0db36dd317293a6400d21",
        "bpe, ids": "bb31bfc7908568241740d54ff19eeb5e8a1a01cbcbfbc31bb549fb6f10a85d4c",
        "bpe, decoded": "d8f6fc017a8c0df6ba86823800b2e1e23c1c9224ec7b5ebb5bc5034fce780455",
        "sentencepiece, ids": "dd98428be206ef0280492d3245e02e92a2ce38ffe3ede445c488de5db40aa1c0",
        "sentencepiece, decoded": "663a3fda46a0ec152215c1d23441b30e24a6a0ea25c410181669291a245a3e57",
    }


def test_token_files_and_the_batches_from_them_are_the_same(made):
    assert made("shards") == {
        "tokens/index.json": "4a735b32a555fe2445708d7b6fa8f11f34ab8bccf66eccc3681061b95c3c5bf8",
        "tokens/tokens-00000.bin": "f334328e4b5dcc09389c1f1f05c62d4cd6cd3efcf6fd544bb27bfe58008395d7",
        "tokens/tokens-00001.bin": "f1146d61f28a085571ce4a6ab6516c114e476313bb980e6200ed5cf3be30db62",
        "tokens/tokens-00002.bin": "420c8fe1afa2e6f53ed6f86fa62ffc85f3f58b0480fa7d8e383b7876bf5cfd8d",
        "documents, batches": "ad5c375b325c4d29b149e6467deef0d678ada4eb1df72edc980c6f012a47d89e",
        "rows, batches": "d07d2fa8871ce864d137b232c2b3cf6086b708a91bf17a58ce20dffbea2d05dc",
        "concat, batches": "fc910a6412346ae1a16bb9623ac96f6baa3a00799d19c73dc624320b4550ad75",
    }


def test_a_model_is_stored_in_the_same_bytes_and_comes_back(made):
    assert made("checkpoints") == {
        "baichuan/config.json": "c373cbaf0b121ff1b1dcd72dba89e6b26bc76eff4ad4f43adb0904df0cac11fd",
        "baichuan/model.safetensors": "b32dad24b8e8fdba05dbb9dfde8c361098c88b3156037a44f0f3159c2b19cb59",
        "chatglm/config.json": "098bd594e0c7fb61948c8d73a283ad8776539e2f90a0db73578f9743e9f9d22c",
        "chatglm/model.safetensors": "cce71d433277a8c5ef6783cb6310417d84088d81c08937eaf9fec8c75fa2a462",
        "chatglm2/config.json": "8d2d2f9a97eda5244d4811a6eb90687fc42d994f682f1b90af0ca613052c5512",
        "chatglm2/model.safetensors": "ab0ba4db648c3e4ac1e8cbc66d5045139776a3301ef4c58ae8d48ad69f1804ac",
        "llama/config.json": "cbfb85aa905ab933fd5d5bd92218a540e1a8e6a956129cd246d6bcf00a1787b6",
        "llama/model.safetensors": "fd9b8aee2973af354e99c04ee40fc0188b49143e76691c7888cd03d017daa124",
        "step-00000007/manifest.json": "8f22f0ceb3dfa3234a7beafe7efa5fe08c364f3cfcf1291eef6617c4df27b330",
        "step-00000007/model.safetensors": "6122017991aaa448c99e5f89580cc450ad0cbeadaa54014c2e7762020ca427ba",
        "step-00000007/state.json": "25e9f3c0c3f8de27bbc48f9b098f5489316eb319340240b8ee56eb72fea97eb9",
        "loaded": "89d208a70c43778e342be12bac0c60ebf95831a546d0cad937f7df779eec4a2c",
        "resumed": "78d6bc022fc4776bb9a6e1df79cd633465db9c45bf085e40981af3ebd0b29dd3",
    }


def test_a_model_is_published_in_the_same_bytes_and_converted_back(made):
    assert made("published") == {
        "llama": "bdd6b9cb7791cc135c3cb539a132c993cbddc1e50b62c0891a6224fa5afee2ec",
        "baichuan": "3e8f3f0531919ab70615289526aa2372933c3277e94c5b0036bb9c3fa7a65fbb",
        "chatglm2": "0db53fbc7767b88889a4a5e0136d0866762ecafefba1de629095efe020e9c1cc",
        "chatglm": "3a0f159cf16064149e99596314d864c40093902efc6b5b17e88ff8a1cc80970c",
        "loaded": "fd8fbe0401dc271ef33316cf743a3e5e745dafd87c742769ed115d2b96ef8e12",
    }


def test_models_say_the_same_at_once_prepared_and_as_a_stream(made):
    assert made("spoken") == {
        "greedy": "51d39add3f2423025de8139c2a1e33d73b21a6f530a0bb581cf54ae69c4da653",
        "sampled": "bcf420008bf06130ad7ba425de9ae0322a284c1e53f5b95653eba178cd1c59ea",
        "greedy, streamed": "2794202ea25e9dc7fd8a9b42317bcfda0c93bdb99a44d8c6833ec40542baa2ff",
        "sampled, streamed": "6932ef2e36340af2122e6c0c8fa67426d2d709b22c2a299f00a4ba8ca057f8ab",
    }


def test_every_kind_of_model_computes_what_it_computed(tmp_path):
    made = numbers(tmp_path)
    adamw, _ = made.pop("AdamW")
    assert adamw[0, :3].tolist() == near([-0.04554806, 0.1219165, -0.5128908])
    found = {kind: [loss.item(), *logits[1, -1, :3].tolist()] for kind, (loss, logits, _) in made.items()}
    assert found["llama, float32"] == near([7.292466, 0.8665943, 1.40129, 1.105258])
    assert found["baichuan, float32"] == near([6.845812, 0.1167558, -1.270693, -1.492808])
    assert found["chatglm2, float32"] == near([7.260395, 2.195445, -0.4426326, 1.939911])
    assert found["chatglm, float32"] == near([6.944243, 1.825415, 0.2353783, -1.094303])


def test_decoding_computes_what_it_computed_prepared_or_not(tmp_path):
    found = sessions(tmp_path)
    assert found.pop("log-likelihood") == near([-22.65863, -6.590782])
    last = {name: steps[-1][1, :2].tolist() for name, steps in found.items()}
    assert last["llama, 1"] == near([1.554176, 2.126334])
    assert last["baichuan, 1"] == near([-1.065486, 0.302945])
    assert last["chatglm2, 1"] == near([-2.004321, -2.261756])
    assert last["chatglm, 1"] == near([-0.0514451, 0.5340222])
    for kind in {name.partition(",")[0] for name in last}:
        assert last[f"{kind}, 24"] == near(last[f"{kind}, 1"])


def test_training_goes_down_the_same_curve(tmp_path):
    found = training(tmp_path)
    assert found["loss"][::7] == near(
        [6.242965, 5.901344, 5.372867, 4.97585, 4.638773, 4.83874, 4.457583, 4.438404]
    )
    assert found["norm"][::7] == near(
        [0.7398295, 0.7462771, 2.011833, 1.163138, 1.756672, 1.613274, 0.9816774, 1.011247]
    )
    assert found["held out"] == near([4.794081, 4.308924])


@pytest.mark.parametrize("part", [attention, numbers, sessions, training], ids=lambda part: part.__name__)
def test_made_again_in_another_process_every_bit_is_the_same(made, tmp_path, part):
    assert hashes(part, tmp_path) == made(part.__name__)
