// What was asked for is not there, and will not be if it is asked for again.

export class Refusal extends Error {}
