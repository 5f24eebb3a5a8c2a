"""Who is let in, and how much at a time: keys, quotas per key, admission."""
