-- One partition: the rows that stay of every address, numbered, with the first 64 bits of their uid
-- (write.sql makes the whole of it).
SELECT * EXCLUDE (url, caption),
  ('0x' || left(md5(substr(url, strpos(url, '://') + 3) || chr(10) || caption), 16))::UBIGINT AS uid
FROM part_rows
