"""Specs, axes, precision, random keys, trees and errors: what every other package stands on."""
