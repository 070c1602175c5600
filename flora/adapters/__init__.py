"""What an adapter is: section 1's form, the kinds that fill it, and their folders on disk."""
