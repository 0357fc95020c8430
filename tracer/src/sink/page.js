(()=>{const q=document.getElementById("q"),n=document.getElementById("n"),rows=[...document.querySelectorAll(".part tr")];
let text,timer;q.hidden=false;
const find=()=>{text??=rows.map(row=>[...row.cells].map(cell=>cell.textContent).join(" ").toLowerCase());
const words=q.value.toLowerCase().split(/\s+/).filter(Boolean);let shown=0;
rows.forEach((row,at)=>{const fits=words.every(word=>text[at].includes(word));row.hidden=!fits;shown+=fits});
n.textContent=words.length?shown+" of "+rows.length:""};
q.addEventListener("input",()=>{clearTimeout(timer);timer=setTimeout(find,100)})})()