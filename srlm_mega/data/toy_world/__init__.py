"""A world of word lists with computable ground truth, small enough for a model that is trained in minutes."""
