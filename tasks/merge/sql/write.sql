-- Rows of the output, in order: what is computed of them. uid = md5 of address and caption.
SELECT
  md5(substr(url, strpos(url, '://') + 3) || chr(10) || caption) AS uid,
  CASE WHEN others = 0 THEN '' ELSE array_to_string(
    list_filter($names::VARCHAR[], lambda name, place: (others >> (place - 1)) & 1 = 1), ','
  ) END AS also_in
FROM chosen
