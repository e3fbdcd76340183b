"""From what each matrix costs to a plan that fits a budget."""
