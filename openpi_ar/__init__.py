"""Vision-language-action models in JAX that both talk and act. Start at `openpi_ar.policy`; the map is
docs/index.md."""
