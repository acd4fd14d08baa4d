"""Files of features and labels become a store."""
