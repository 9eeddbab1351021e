"""What is done with a model: prefill, generation, flow matching, losses."""
