"""Results as people read them: statistics, tables, pictures, comparisons."""
