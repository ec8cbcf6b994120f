"""Methods side by side: their stages, runs, differences and costs."""
