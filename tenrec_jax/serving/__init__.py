"""The recommender as a service: JSON over HTTP, and a page that shows what it does."""
