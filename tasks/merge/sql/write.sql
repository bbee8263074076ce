-- One output file: consecutive places of the selection order; uid = md5 of address and caption.
SELECT md5(substr(url, strpos(url, '://') + 3) || chr(10) || caption) AS uid, source, url, caption, original_id, similarity, width_hint, height_hint, also_in
FROM ordered
WHERE place >= $first AND place < $last
ORDER BY place
