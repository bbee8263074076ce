-- The entries by which a merge balances, numbered in their order.
FROM listed ORDER BY number
