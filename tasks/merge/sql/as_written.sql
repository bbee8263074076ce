-- Joins as pairs.sql has them, captions' words on the left: nothing tells how many these are.
SET disabled_optimizers = 'statistics_propagation,build_side_probe_side,join_order'
