"""What runs, stores, checks and hands out the notebooks; its commands are in __main__.py."""
import sys

# jsonschema would build a grammar of international addresses, which takes longer than all else
# that nbformat imports, and which no notebook needs.
sys.modules.setdefault("rfc3987_syntax", None)
