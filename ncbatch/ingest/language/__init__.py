"""Language models: texts become labelled windows of tokens, windows become features in a store."""

from ncbatch.ingest.language.corpus import Corpus, TokenBatch, open_corpus

__all__ = ["Corpus", "TokenBatch", "open_corpus"]
