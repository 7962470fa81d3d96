"""Statistics of a whole data set, in one pass or layer by layer, in one process or several."""
