"""What a person looks at: a run as a page of pictures and tables, and as one screen of a terminal."""
