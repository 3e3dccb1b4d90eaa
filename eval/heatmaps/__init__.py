"""Where a model looks: heat maps, their pictures, and how well they point at boxes."""
