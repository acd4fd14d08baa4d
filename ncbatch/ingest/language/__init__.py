"""Language models: texts become labelled windows of tokens, windows become features in a store."""
