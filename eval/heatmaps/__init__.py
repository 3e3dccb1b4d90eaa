"""Heat maps: where a model looks, drawn over images and compared with boxes."""
