"""The command line: `minillm speedrun | pretrain | corpus | clean | generate | tokenizer | convert | info`."""
