"""Reference values, each computed in another way than in the package."""
