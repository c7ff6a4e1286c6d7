"""Parts of the glue task: its data and its tiny encoder."""
