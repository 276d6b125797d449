"""Side-by-side measurements: `python -m bench PART`, see bench/__main__.py."""
