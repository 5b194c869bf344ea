"""Imported first in the server that submissions are forked from: what is loaded here, each of them
has, and what is not here, none."""
from .submission import without_references

without_references()
