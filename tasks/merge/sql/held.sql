-- One partition: how many rows hold each entry.
SELECT number, count(*) AS rows FROM pairs GROUP BY number
