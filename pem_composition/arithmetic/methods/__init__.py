"""Data-free merging methods: ``registry`` describes them, the other files compute them."""
