"""Real servers on loopback that tests start and end: object stores, a Hub, and a proxy that makes trouble."""
