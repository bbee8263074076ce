"""The demo's world in a box: real pictures, real captions, the web's faults on loopback."""
