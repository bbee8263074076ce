-- One partition: rows that stay at `$t`, and that would at an eighth of it to eight times as much.
SELECT t, count(*) AS rows
FROM deduped
JOIN (SELECT DISTINCT greatest(1, $t::BIGINT * unnest([1, 2, 4, 8, 16, 32, 64]) // 8) AS t) AS others
  ON smallest_t < t
GROUP BY t
