-- One partition: which row holds which entry. MetaCLIP's rule: ` entry ` is part of ` caption ` with
-- spaces around its punctuation marks. What lies between its spaces are its words here, so that is a
-- run of them that is equal to the entry's: runs of one word, then, of those that longer entries
-- begin with, of one word more, and so on (run.sql).
CREATE OR REPLACE TEMP TABLE pairs AS
WITH split AS (
  SELECT row, string_split(regexp_replace(caption, $marks, ' \0 ', 'g'), ' ') AS words FROM part_rows
),
begun AS (
  SELECT row, unnest(words) AS word_0{words} FROM split
),
run_0 AS MATERIALIZED (
  SELECT begun.* EXCLUDE word_0, prefix, number, goes_on
  FROM begun
  JOIN (
    FROM read_parquet($prefixes, hive_partitioning = false) WHERE depth = 0
  ) ON prefix = word_0
)
{runs}
SELECT DISTINCT row, number FROM ({found}) WHERE number IS NOT NULL
