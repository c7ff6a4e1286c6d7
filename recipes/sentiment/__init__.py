"""The sentiment of film reviews, a second task for the studies."""
