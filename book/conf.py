"""Sphinx configuration of the book. `make book` builds it without a network, from the outputs stored in the chapters."""

import sys
from importlib.metadata import version as installed_version
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

project = "minillm"
author = "The minillm authors"
release = version = installed_version("minillm")
html_title = "minillm"
language = "en"

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "sphinx_copybutton",
    "sphinx-mathjax-offline",
    "site_extension",  # book/site_extension.py: the chapters, the API pages and their links to each other
]
root_doc = "index"
exclude_patterns = ["_build", "**.ipynb_checkpoints", "**.tmp"]
templates_path = ["_templates"]

# Chapters: stored outputs, nothing is run.
nb_execution_mode = "off"
nb_merge_streams = True
nb_code_prompt_show = "Show {type}"
nb_code_prompt_hide = "Hide {type}"
nb_ipywidgets_js = {}
myst_enable_extensions = ["dollarmath", "amsmath", "colon_fence", "deflist", "smartquotes", "attrs_inline"]
myst_heading_anchors = 3
myst_dmath_double_inline = True
mathjax3_config = {"chtml": {"displayAlign": "center"}}

# API: signatures as they are written; docstrings in Google's style.
autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
autodoc_inherit_docstrings = False
autodoc_typehints = "signature"
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_rtype = False
napoleon_use_param = False  # "k, v: the two of them" stays one entry
napoleon_custom_sections = [("Attributes", "params_style")]
default_role = "py:obj"
add_module_names = False
python_maximum_signature_line_length = 88
toc_object_entries_show_parents = "hide"

# Pages.
html_theme = "sphinx_book_theme"
html_static_path = ["_static"]
html_css_files = ["custom.css"]
html_logo = html_favicon = "_static/logo.svg"
html_copy_source = True
html_show_sourcelink = False
html_context = {"default_mode": "auto"}
html_theme_options = {
    "logo": {"text": "minillm", "alt_text": "minillm: to the first page"},
    "search_bar_text": "Search the book…",
    "show_toc_level": 1,
    "navbar_persistent": [],
    "primary_sidebar_end": [],
    "show_navbar_depth": 1,
    "use_download_button": True,
    "use_fullscreen_button": False,
    "footer_content_items": ["extra-footer.html"],
    "extra_footer": f"minillm {version}. Every figure and number on these pages was made by the code beside it.",
    "pygments_light_style": "tango",
    "pygments_dark_style": "monokai",
}
copybutton_selector = "div.cell_input div.highlight pre, div.highlight-bash pre, div.highlight-python pre"
copybutton_prompt_text = r">>> |\.\.\. |\$ "
copybutton_prompt_is_regexp = True
