"""A world of word lists in which what is right can be computed, small enough for a model trained in minutes."""
