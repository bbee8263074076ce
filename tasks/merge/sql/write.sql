-- One output file: consecutive places of the selection order.
SELECT uid, source, url, caption, original_id, similarity, width_hint, height_hint, also_in
FROM ordered
WHERE place >= $first AND place < $last
ORDER BY place
