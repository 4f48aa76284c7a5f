"""What to remove: scores, ranges, strategies, masks, budgets and plans."""
