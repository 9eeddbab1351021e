"""The embedded tabletop: tasks, a MuJoCo world with ray-cast cameras, a scripted expert and recorded demonstrations."""
