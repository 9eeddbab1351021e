"""Layers, caches, towers and the models made of them: parameters and forward passes, no sampling and no losses."""
