"""A run as a person reads it: a page of pictures and tables, one screen of a terminal, its decisions replayed."""
