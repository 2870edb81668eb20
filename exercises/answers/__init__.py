"""One answer to each exercise, for when you have yours."""
