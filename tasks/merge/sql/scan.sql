-- One metadata file: every row with its partition, or with the first rule it fails (part -1).
WITH published AS (
  SELECT file_row_number AS row_in_file,
    {columns}
  FROM read_parquet($path, file_row_number = true, hive_partitioning = false)
),
{normalise},
judged AS (
  SELECT *, md5(address) AS hash, CASE
    WHEN coalesce(clean_url, '') = '' THEN 'missing_url'
    WHEN url IS NULL THEN 'unsupported_url'
    WHEN coalesce(caption, '') = '' THEN 'missing_caption'
    WHEN length(caption) < $min_caption_chars THEN 'short_caption'
    WHEN length(caption) > $max_caption_chars::BIGINT THEN 'long_caption'
    WHEN least(width, height) < $min_side::BIGINT THEN 'small_image'
    WHEN greatest(width, height) > $max_aspect::DOUBLE * least(width, height)
      THEN 'extreme_aspect'
    WHEN similarity < $min_similarity::DOUBLE THEN 'low_similarity'
    WHEN $unknown_similarity = 'drop' AND $min_similarity::DOUBLE IS NOT NULL
      AND has_similarity AND similarity IS NULL THEN 'unknown_similarity'
    WHEN list_max(unsafe_scores) > $max_unsafe::DOUBLE
      OR list_has_any(unsafe_tags, $unsafe_tags::VARCHAR[]) THEN 'unsafe'
    WHEN $unknown_unsafe = 'drop' AND $max_unsafe::DOUBLE IS NOT NULL
      AND list_count(unsafe_scores) < len(unsafe_scores) THEN 'unknown_unsafe'
    WHEN $unknown_unsafe = 'drop' AND len($unsafe_tags::VARCHAR[]) > 0
      AND NOT list_has_all($known_tags::VARCHAR[], unsafe_tags) THEN 'unknown_unsafe'
    WHEN watermark > $max_watermark::DOUBLE THEN 'watermark'
    WHEN $unknown_watermark = 'drop' AND $max_watermark::DOUBLE IS NOT NULL
      AND has_watermark AND watermark IS NULL THEN 'unknown_watermark'
  END AS reason
  FROM normalised
)
SELECT
  $source::INTEGER AS source,
  $file::INTEGER AS file,
  reason,
  CASE WHEN reason IS NULL THEN row_in_file END AS row_in_file,
  CASE WHEN reason IS NULL THEN hash::UUID END AS key,
  CASE WHEN reason IS NULL THEN similarity END AS similarity,
  CASE WHEN reason IS NULL THEN original_id END AS original_id,
  CASE WHEN reason IS NULL THEN ('0x' || left(hash, 4))::INTEGER % $partitions ELSE -1 END AS part
FROM judged
