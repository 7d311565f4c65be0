const commas = require("comma-number");

console.log(`Node has fired ${commas(1234567)} pots`);
