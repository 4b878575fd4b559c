"""How Sphinx makes the documentation site; `nox -s docs` runs it, and warnings are errors."""

from kvz.info import version as package_version

project = "kvz"
copyright = "the kvz developers"
version = release = package_version()
extensions = ["myst_parser", "numpydoc", "sphinx.ext.autodoc", "sphinx.ext.autosummary"]
exclude_patterns = ["_build"]
html_theme = "furo"
html_title = "kvz"
html_static_path = ["pictures"]
pygments_dark_style = "monokai"
html_css_files = ["site.css"]
myst_enable_extensions = ["colon_fence", "dollarmath"]
myst_heading_anchors = 3
autosummary_generate = True
autodoc_member_order = "bysource"
numpydoc_show_class_members = False
numpydoc_class_members_toctree = False
nitpicky = False
