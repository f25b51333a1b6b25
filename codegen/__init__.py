"""A plan made to run: shapes localised, collectives inserted, kernels put in."""
