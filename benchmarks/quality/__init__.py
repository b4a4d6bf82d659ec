"""What methods reach on equal budgets: the project's own comparisons, one command each."""
