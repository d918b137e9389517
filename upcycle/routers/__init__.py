"""First router weights from files and from text; those drawn at random are content of the plan itself."""
