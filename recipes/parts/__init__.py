"""Code that the recipes share."""
