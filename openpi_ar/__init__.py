"""Vision-language-action models in JAX that both talk and act. Start at `openpi_ar.policy`; map: docs/index.md."""
