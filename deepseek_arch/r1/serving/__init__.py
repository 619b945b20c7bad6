"""Conversations with a reasoning model: in a terminal, and for clients of OpenAI's protocol."""

from .reasoner import Reasoner, Reply, Splitter, TokenReader
from .server import make_server

__all__ = ["Reasoner", "Reply", "Splitter", "TokenReader", "make_server"]
